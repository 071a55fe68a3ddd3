"""What others would use in our place, written as the field's reference implementations are: to be measured against."""
