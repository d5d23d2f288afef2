"""Every element of a step against the float64 textbook form."""
