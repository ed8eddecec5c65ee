"""Who runs an encoder's layers. Each has `limit(layers, batch)`, why it can't or None;
`run(layers, batch)`, [tokens or rows, hidden]; and `DEVICE`, its type, None for any."""
