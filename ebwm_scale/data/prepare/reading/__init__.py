"""Reading documents out of what people have on disk: one file for each kind of input."""
