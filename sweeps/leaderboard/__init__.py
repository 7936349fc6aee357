"""Tables from records: columns, ranking, the CSV files, and views of them."""
