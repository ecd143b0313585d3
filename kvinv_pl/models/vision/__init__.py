"""Networks that look at pictures: SAM's masks, CLIP, DINO and LPIPS."""
