"""From the command line to the folder of a run; above training, and the only part that sees a composed config."""
