"""What several packages need and no station of the data flow owns: files, ranks, an event loop."""
