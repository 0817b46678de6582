"""How assets are made: machinery that knows no particular asset."""
