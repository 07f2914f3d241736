"""What commands show people: lines, pictures, pages."""
