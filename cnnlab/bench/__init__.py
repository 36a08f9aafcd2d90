"""How fast is a run, and where does its time go? Arms that train side by side, and the machine's own limits."""
