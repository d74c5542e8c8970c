"""igate_edge in ROS 2: a lifecycle node that answers a camera with all tasks of a bundle."""
