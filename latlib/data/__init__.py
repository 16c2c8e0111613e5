"""Records of text from files and the hub, their splits, and the prompts that models are asked."""
