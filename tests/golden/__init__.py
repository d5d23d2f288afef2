"""What other libraries computed, recorded once; see ``record.py``."""
