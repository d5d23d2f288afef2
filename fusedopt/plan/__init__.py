"""What an optimizer asks of a backend: the description of a plan, and the interface."""
