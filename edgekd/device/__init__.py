"""What runs at the bedside: numpy, Pillow, pydantic and one runtime. No torch."""
