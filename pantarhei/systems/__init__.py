"""Networks that learn what changes: fields on grids, series of sensors, graphs."""
