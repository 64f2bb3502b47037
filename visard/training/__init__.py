"""Recipe + data set -> run directory: state, optimizer, schedule, processes, loop, logs."""
