"""Training of routers: objectives, the loop that accelerate drives, and what it leaves behind."""
