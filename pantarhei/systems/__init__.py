"""What will this changing thing do next? Learned models of fields, graphs, series and bodies."""
