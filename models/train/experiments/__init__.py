"""The claims of Gloeckle et al., arXiv 2404.19737, rerun on models that a laptop or one GPU trains."""
