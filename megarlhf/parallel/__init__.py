"""The only package that knows ranks: layout, mesh, collectives, the pipeline driver, offload, launching."""
