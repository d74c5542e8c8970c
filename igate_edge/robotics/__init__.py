"""Robots' messages, bags, flight recordings and their replay. Nothing here needs ROS to be installed."""
