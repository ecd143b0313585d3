"""What is put into a checkpoint: LoRAs, and words of textual inversions."""
