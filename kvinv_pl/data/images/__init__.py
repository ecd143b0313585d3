"""Pictures: read, cropped, masked, and put side by side."""
