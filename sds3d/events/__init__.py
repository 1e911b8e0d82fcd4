"""What a run tells the world, and the listeners that turn it into files and progress on a terminal."""
