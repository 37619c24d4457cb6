"""What a machine can do, stage by stage, beside what bounds each."""
