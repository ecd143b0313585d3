"""What tools/train_menagerie.py is made of: pictures, the shared loop, and one module for each stage."""
