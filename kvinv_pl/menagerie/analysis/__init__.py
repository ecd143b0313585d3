"""What is seen of an animal in a picture."""
