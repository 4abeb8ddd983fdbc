"""What would happen with other statistics: the table, the cause that it names, who is to blame."""
