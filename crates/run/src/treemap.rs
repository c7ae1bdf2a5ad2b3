//! Where the parts of a whole lie in a rectangle, each with an area by its size.
//!
//! Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000): a row gets parts as long as they become more
//! like squares.

/// A rectangle.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Area {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

impl Area {
    /// What is left of it within these borders.
    pub(crate) fn within(self, side: f64, top: f64) -> Self {
        Self {
            x: self.x + side,
            y: self.y + top,
            width: (self.width - 2.0 * side).max(0.0),
            height: (self.height - top - side).max(0.0),
        }
    }
}

/// Where each part lies. `sizes`: the biggest first.
pub(crate) fn squarified(sizes: &[f64], area: Area) -> Vec<Area> {
    let total: f64 = sizes.iter().sum();
    if total <= 0.0 || area.width <= 0.0 || area.height <= 0.0 {
        return vec![Area::default(); sizes.len()];
    }
    let scale = area.width * area.height / total;
    let mut rest = area;
    let mut placed = Vec::with_capacity(sizes.len());
    let mut from = 0;
    while from < sizes.len() {
        let is_wide = rest.width >= rest.height;
        let side = rest.width.min(rest.height).max(f64::EPSILON);
        let mut to = from + 1;
        while to < sizes.len()
            && worst(&sizes[from..=to], scale, side) <= worst(&sizes[from..to], scale, side)
        {
            to += 1;
        }
        let row = &sizes[from..to];
        let thick = row.iter().sum::<f64>() * scale / side;
        let mut along = 0.0;
        for size in row {
            let length = match thick > 0.0 {
                true => size * scale / thick,
                false => 0.0,
            };
            let (x, y) = (rest.x, rest.y);
            placed.push(match is_wide {
                true => Area {
                    x,
                    y: y + along,
                    width: thick,
                    height: length,
                },
                false => Area {
                    x: x + along,
                    y,
                    width: length,
                    height: thick,
                },
            });
            along += length;
        }
        match is_wide {
            true => (rest.x, rest.width) = (rest.x + thick, (rest.width - thick).max(0.0)),
            false => (rest.y, rest.height) = (rest.y + thick, (rest.height - thick).max(0.0)),
        }
        from = to;
    }
    placed
}

/// How long the longest rectangle of a row is, compared with its width.
fn worst(row: &[f64], scale: f64, side: f64) -> f64 {
    let sum: f64 = row.iter().sum::<f64>() * scale;
    let ratio = |size: &f64| {
        let ratio = side * side * size * scale / (sum * sum);
        ratio.max(1.0 / ratio)
    };
    row.iter().map(ratio).fold(1.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fill_the_area_by_their_sizes_and_do_not_overlap() {
        let area = Area {
            x: 10.0,
            y: 20.0,
            width: 600.0,
            height: 400.0,
        };
        let sizes = [6.0, 6.0, 4.0, 3.0, 2.0, 2.0, 1.0];
        let placed = squarified(&sizes, area);
        for (size, at) in sizes.iter().zip(&placed) {
            let share = at.width * at.height / (600.0 * 400.0);
            assert!((share - size / 24.0).abs() < 1e-9, "{placed:?}");
            assert!(at.x >= 10.0 && at.x + at.width <= 610.0 + 1e-9);
            assert!(at.y >= 20.0 && at.y + at.height <= 420.0 + 1e-9);
            let ratio = at.width / at.height;
            assert!((0.3..4.0).contains(&ratio), "{placed:?}");
        }
        for (index, one) in placed.iter().enumerate() {
            for other in &placed[index + 1..] {
                let apart = |a: f64, a_len: f64, b: f64, b_len: f64| {
                    a + a_len <= b + 1e-9 || b + b_len <= a + 1e-9
                };
                assert!(
                    apart(one.x, one.width, other.x, other.width)
                        || apart(one.y, one.height, other.y, other.height)
                );
            }
        }
        assert_eq!(squarified(&[0.0, 0.0], area), [Area::default(); 2]);
        assert!(squarified(&[], area).is_empty());
    }
}
