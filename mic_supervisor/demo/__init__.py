"""What `mic-supervisor demo` is made of: a world of its own, a tour through it, and a narrator."""
