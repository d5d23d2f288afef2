"""The parts of one step of an optimizer, and of what an optimizer does besides."""
