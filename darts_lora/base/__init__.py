"""What everything stands on: errors, files, bounds of options, interruption, the command line.
Not here: anything that knows a model, a data set or a search."""
