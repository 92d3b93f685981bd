"""Native modules: thin bindings of the C ABI, wrapped by the facades one level up."""
