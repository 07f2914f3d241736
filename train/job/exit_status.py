"""The exit statuses of a training process, for whatever started it; imports nothing."""

STOPPED = 75  # EX_TEMPFAIL: it was asked to stop and everything is saved, start it again
LOST = 76  # another process of the job is to blame: start all of them again
CANNOT_RUN = 2  # a command that cannot be run: trying again is of no use
