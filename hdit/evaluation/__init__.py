"""How far two sets of images are from each other: features, and the distances between them."""
