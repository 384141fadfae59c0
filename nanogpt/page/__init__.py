"""The page of a model: HTML, CSS and JavaScript, and what puts them into one file."""
