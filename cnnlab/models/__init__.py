"""The networks, each written from its paper, with torchvision's `state_dict` keys where it has them."""
