"""The interface of the backends, and the description of a plan."""
