"""The paper on tensors: DDIM in both directions, and the three stages of Algorithm 1."""
