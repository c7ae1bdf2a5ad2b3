//! A list of rows with a cursor, of which a part is shown.

/// Which row the cursor is on, and which row is shown first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rows {
    pub(crate) cursor: usize,
    first: usize,
    /// How many rows the screen has, when it was drawn last.
    height: usize,
}

/// Where the cursor goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Move {
    Up,
    Down,
    PageUp,
    PageDown,
    Begin,
    End,
}

impl Rows {
    /// Moves the cursor among `count` rows.
    pub(crate) fn go(&mut self, to: Move, count: usize) {
        let page = self.height.max(2) - 1;
        self.cursor = match to {
            Move::Up => self.cursor.saturating_sub(1),
            Move::Down => self.cursor + 1,
            Move::PageUp => self.cursor.saturating_sub(page),
            Move::PageDown => self.cursor + page,
            Move::Begin => 0,
            Move::End => count,
        };
        self.cursor = self.cursor.min(count.saturating_sub(1));
    }

    /// Moves what is shown, without a cursor: `cursor` is the first row that is shown.
    pub(crate) fn scroll(&mut self, to: Move, count: usize) {
        self.go(to, count);
        self.cursor = self.cursor.min(count.saturating_sub(self.height));
    }

    /// The rows that fit into `height`, with the cursor among them.
    pub(crate) fn shown(&mut self, height: usize, count: usize) -> std::ops::Range<usize> {
        self.height = height;
        self.cursor = self.cursor.min(count.saturating_sub(1));
        let last_first = count.saturating_sub(height);
        self.first = self
            .first
            .min(self.cursor)
            .max((self.cursor + 1).saturating_sub(height))
            .min(last_first);
        self.first..(self.first + height).min(count)
    }

    /// As [`Self::shown`], for text without a cursor.
    pub(crate) fn scrolled(&mut self, height: usize, count: usize) -> std::ops::Range<usize> {
        self.height = height;
        self.cursor = self.cursor.min(count.saturating_sub(height));
        self.cursor..(self.cursor + height).min(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_is_always_among_the_rows_that_are_shown() {
        let mut rows = Rows::default();
        assert_eq!(rows.shown(3, 0), 0..0);
        assert_eq!(rows.shown(3, 10), 0..3);
        rows.go(Move::End, 10);
        assert_eq!((rows.cursor, rows.shown(3, 10)), (9, 7..10));
        rows.go(Move::PageUp, 10);
        assert_eq!((rows.cursor, rows.shown(3, 10)), (7, 7..10));
        rows.go(Move::Up, 10);
        assert_eq!(rows.shown(3, 10), 6..9);
        rows.go(Move::Down, 10);
        assert_eq!(rows.shown(1, 10), 7..8);
        // The list became shorter.
        assert_eq!((rows.shown(3, 2), rows.cursor), (0..2, 1));
        rows.go(Move::Begin, 2);
        rows.go(Move::Up, 2);
        assert_eq!(rows.cursor, 0);
    }
}
