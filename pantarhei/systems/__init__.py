"""Methods that forecast changing things: sensors, fields, graphs."""
