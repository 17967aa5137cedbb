"""Where roots come from: published images, and the sources they are built from."""
