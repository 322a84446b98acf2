"""One file per learning task; `synthos.recipes.<name>.RECIPE` is the class."""
