"""What `baton top` is made of: how the router is asked, what is drawn of its answer, and the terminal that it is drawn on."""
