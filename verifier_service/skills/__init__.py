"""The skill bank: skills and common mistakes from experience; stored, versioned, retrieved, and grown."""
