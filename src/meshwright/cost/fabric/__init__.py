"""The network as links: what a layout puts on each, which is hottest, and what a lost or slower one costs."""
