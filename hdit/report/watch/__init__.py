"""The page of `hdit watch`: what runs tell, drawn in a browser."""
