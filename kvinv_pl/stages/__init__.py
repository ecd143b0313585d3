"""The three stages of pictures, from and into their run folders."""
