// Runs before the first paint: a theme that the person chose replaces that of the system. A cookie, because cookies of
// 127.0.0.1 do not depend on the port, which is another one every time.
{
  const chosen = /(?:^|; )updraft-theme=(light|dark)/.exec(document.cookie);
  if (chosen) document.documentElement.dataset.theme = chosen[1];
}
