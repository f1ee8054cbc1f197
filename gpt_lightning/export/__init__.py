"""Models in other formats, and models of other programs."""
