"""The machine: the compiled extension, threads, environment variables, interrupts."""
