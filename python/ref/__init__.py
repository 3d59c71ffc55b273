"""The specification in plain torch: what every op computes, and the implementation of the ops on a CPU."""
